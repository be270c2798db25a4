"""GPTQ for one layer: tensors in, codes and scales out; no models and no files.

How a column is rounded is in `solve.py`. Read in this order:

* `hessian`: sum the Hessian H = Σ x xᵀ of the inputs of a layer.
* `factor`: choose the order of columns, damp the Hessian and factorise it.
* `solve`: round the columns one after the other, and pass their errors on.
* `grid`: find the scale and the zero point of a group of weights.
* `refine`: improve codes and scales afterwards.
* `quantized_linear`: the result, its float weights and its output error.
* `triton_launch`, `triton_kernels`: the same steps as fused kernels on a GPU.

`gptq_cli/quantization/block_loop.py` collects the inputs of each layer and calls the solver.
"""
