"""The code for a GPU, on a machine that has none: generated, compiled, counted and, on the CPU, interpreted.

    python -m benchmarks.gpu_model table             # simulates what benchmarks/results/gpu-simulated.json lacks
    python -m benchmarks.gpu_model show              # that file as tables
    python -m benchmarks.gpu_model check bert        # what the tests want to know of a small model, as JSON
    python -m benchmarks.gpu_model interpret codecs  # the same of codecs that are interpreted on the CPU

Inductor writes Triton for an H100 or an A100 as it would there; Triton's compiler and ptxas make machine code of it;
and a simulator runs the generated Python on fake tensors: the bytes that are read and written, FLOPs, launches, and
the peak of memory. No kernel runs on a device: times are a roofline, an estimate from below, and no measurement.

It takes Linux, g++, and the extra `gpu-codegen`, and it touches private names of the pinned versions of torch and
Triton. It runs in processes of its own, for `guard.load()` has to come before torch is imported.
"""
