"""A transformers model as a stream of blocks; its structure is found by running it.

The block loop that drives these modules is `gptq_cli/quantization/block_loop.py`. Read here:

* `stream`: load one block at a time, and carry hidden states from block to block.
* `skeleton`: build the model without weights, and find its blocks.
* `names`: map tensors of the checkpoint to parameters of the model.
* `block_calls`: record the arguments of each block, and check that the blocks form a chain.
* `stages`: find the linears of a block that share one input.
* `paused_forwards`: pause the forwards of a block before each stage.
* `experts`: split stacked experts into linears.
"""
