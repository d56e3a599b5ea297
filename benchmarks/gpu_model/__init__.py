"""The code for a GPU, on a machine that has none: generated, compiled, counted and, on the CPU, interpreted.

    python -m benchmarks.gpu_model check bert          # the tests' checks of one small model, as JSON
    python -m benchmarks.gpu_model table               # the table of docs/benchmarks.md, into results/gpu-simulated.json
    python -m benchmarks.gpu_model show                # that file as tables

Inductor writes Triton for an H100 or an A100 as it would there, Triton's compiler and ptxas make machine code of it, and
a simulator runs the generated Python on fake tensors: the bytes that are read and written, FLOPs, launches, and the peak
of memory. No kernel runs on a device: times are a roofline, an estimate from below, and no measurement.

It takes Linux, g++, and the extra `gpu-codegen`, and it touches private names of the pinned versions of torch and Triton.
Everything runs in processes of its own: `guard.load()` has to come before torch is imported.
"""
