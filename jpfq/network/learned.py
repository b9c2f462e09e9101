"""`Learned`: what learning did to a result."""

from typing import NamedTuple


class Learned(NamedTuple):
    """The losses on held-out batches before and after `jpfq.learn`, and the number of updates.

    loss: "outputs", "logits" or "function". before, after: means over the held-out batches, of the deployed networks.
    steps: updates that were made. kept: updates after which the result was taken; 0 is the start.
    moved: share of codes that changed.

    Examples:
        >>> learned = jpfq.learn(quantized, model, batches, jpfq.Learning(steps=20), variables=variables).learned
        >>> learned.after <= learned.before, learned.steps
        (True, 20)
    """

    loss: str
    before: float
    after: float
    steps: int
    kept: int
    moved: float

    def __str__(self) -> str:
        name = {"outputs": "square error of the outputs", "logits": "divergence of the logits"}.get(self.loss, "loss")
        return (
            f"Learned in {self.steps} steps; the network after {self.kept} of them is kept: {name} on held-out batches "
            f"{self.before:.4g} before, {self.after:.4g} after; {self.moved:.2%} of the codes changed."
        )
