"""The Linen image networks of flaxmodels at their own widths, on small images and with random weights."""

import jax
import pytest

from tests.packages import helpers

flaxmodels = pytest.importorskip("flaxmodels", reason="needs flaxmodels: see the extra 'packages'")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, on import and in use

MODELS = {  # name: the module, and how many kernels it has
    "ResNet18": (lambda: flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=10), 21),
    "VGG16": (lambda: flaxmodels.VGG16(output="activations", pretrained=None, include_head=False), 13),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_quantized_whole(name):
    make, count = MODELS[name]
    module, batches = make(), [jax.nn.sigmoid(helpers.normal(seed, 2, 32, 32, 3)) for seed in range(2)]
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), batches[0], train=False))
    case = helpers.linen_case(module, helpers.random_like(shapes), {"train": False}, batches)
    assert len(case.kernels) == count
    assert all(path.endswith("/kernel") for path in case.kernels)
    assert not helpers.check(case).skipped
