"""How a student learns: losses on response positions, training rows, and the loop over a stage.

Plain PyTorch; runs in one process or in many that talk through torch.distributed. `pipelines.distill` and
`pipelines.teacher` put it on Ray Train.
"""
