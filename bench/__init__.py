"""Speed and memory of trgnet beside other formulations of the same functions.

    make bench                                   # everything: prints tables, stores the run under bench/results/, draws it
    python -m bench network metrics              # some sections, in an installed environment
    python -m bench --show FILE --against FILE   # a stored run again, beside another
    pytest bench/ --benchmark-only ...           # the same with pytest-benchmark's own options

Every figure follows a passed comparison of values and gradients (:mod:`bench.agreement`); where that fails, nothing is
timed. One group of a table is one function, its rows are its providers:

``published``
    What the specification of the published network says, operation by operation, with its loops (:mod:`bench.published`,
    :mod:`bench.published_metrics`, :mod:`bench.published_data`).
``reference``
    Our operators in plain PyTorch.
``compiled``
    The same through torch.compile. On a CPU only where ``--providers`` names it: compiling the network takes minutes there.
``recompute``
    The same, keeping only their inputs for the backward pass.
``ours``
    What a user of trgnet gets: the backend ``auto``, Triton kernels on a GPU, analytic passes on a CPU.

Times are medians of rounds that wait for the device, with their 20th and 80th percentile; caches are emptied before each.
Every dropout is active in training. Rates are those of the least bytes and FLOPs of the function, the same for every
provider; their ceilings are measured in the same run. Memory is what torch's allocator gives out at most, beside what
exists before. Compare rows of one run, not of two: the ratio is what holds on another machine. Where other work shares the
cores, set ``OMP_NUM_THREADS=1``: threads that wait for a taken core would be all there is to see.

Five more commands: :mod:`bench.gpu` checks and times everything on a GPU within nine minutes; ``python -m bench.launches``,
``python -m bench.host`` and ``python -m bench.compiled`` measure without a device; ``python -m bench.predict`` predicts
times on an H100.
"""
