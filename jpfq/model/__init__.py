"""A model as a traced program: framework adapters, equations, kernels, and the products that use them."""
