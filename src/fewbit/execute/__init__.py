"""Execute: run a captured graph with something watched, replaced or quantized on the way.

executor   the only code that runs a graph, node by node
stream     many batches through it, all at the same node
simulate   the integer model in PyTorch: a graph with the choices of a plan
rows       what an op with a weight reads, as rows: tokens, patches
samples    inputs of single ops, from which their outputs can be computed again
watch      the float graph over images, some of its nodes handed to functions
"""
