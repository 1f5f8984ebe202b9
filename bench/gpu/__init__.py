"""Checks and times everything on a GPU with one command.

    make gpu                                # or: python -m bench.gpu
    python -m bench.gpu --phases step,graph # some phases
    python -m bench.gpu --show FILE         # the tables of a stored run, or of what a killed one left
    python -m bench.gpu --markdown FILE     # the short tables for a document
    python -m bench.gpu --tiny              # a trial of everything at tiny sizes; needs no GPU

It runs from a checkout, without installation, and needs torch, triton, numpy and einops only. It takes nine minutes at most
(``--limit``). Results go to a JSON file, by default ``bench/results/gpu/DATE-GPU.json``. Nothing is uploaded.

The work is a list of items (:mod:`bench.gpu.plan`), the most important first. They run in processes of their own
(:mod:`bench.gpu.processes`), each with a time limit: a crash or a hang is a finding, and the others go on. Each result is
written when it is there (:mod:`bench.gpu.journal`), so a killed run keeps what it had.

Phases:

``values``
    Values and gradients of every kernel beside float64 and plain PyTorch, at small, unaligned and padded sizes and at the
    published one, in every precision, and whether repeats are equal bit for bit. A process for each operator and precision.
``sanitizer``
    The same kernels under NVIDIA's compute-sanitizer, where it is found, at one small size.
``warm``
    torch.compile of the network: fills its cache, so that timing need not wait for it.
``sync``
    Whether a training step waits for the GPU.
``step``
    Time and peak memory of a training step: ours, plain PyTorch, torch.compile, the published formulation.
``graph``
    The training step as a CUDA graph.
``profile``
    The kernels of a training step by their time on the device.
``optimizers``
    LCAM, SMES and gated SMES beside torch's fused optimizers.
``operators``
    Every operator, forward and forward with backward, beside its floor: the least bytes at the measured copy bandwidth.
"""
