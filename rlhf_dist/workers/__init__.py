"""One file a hosted model. Ordinary classes: `cluster/` decides in which process they live.

Every batch method takes this rank's rows and `micro_batches`, row indices into them; an idle micro-batch is an empty list.
"""
