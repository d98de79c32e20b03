"""The compiled CUDA kernels, called with tensors: one file per op, for ``cuda`` and ``emulated``.

``register`` enters them into the table of ``deeplab_fast.backends``; no file here knows whether its
kernels run on a GPU or in the emulator.
"""
