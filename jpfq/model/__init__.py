"""A model as a traced program: adapters of frameworks, equations, kernels and the products they serve."""
