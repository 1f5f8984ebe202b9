"""Speed and memory of trgnet beside the published formulation of the same network.

    pytest bench/ --benchmark-columns=median,iqr,rounds --benchmark-json=FILE

Every figure follows a passed comparison of values and gradients (see :mod:`bench.agreement`); where that
fails, nothing is timed. One group of the printed table is one function, its rows are its providers:

``published``
    What the specification of the published network says, operation by operation (:mod:`bench.published`).
``reference``, ``recompute``
    The backends of trgnet's operators (:mod:`trgnet.kernels.backend`).

Times are of forward and backward, for the training step of loss and optimizer too, with every dropout active.
Compare rows of one run, not of two: the ratio is what holds on another machine. Where other work shares the
cores, set ``OMP_NUM_THREADS=1``: threads that wait for a taken core would be all there is to see.
``extra_info`` in the JSON file has the shapes, the least bytes and FLOPs of the function, the rates that the
median makes of them, and the peak memory of a training step.
"""
