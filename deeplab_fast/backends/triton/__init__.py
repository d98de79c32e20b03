"""Every op in Triton, one file each: kernels first, launchers last. Import imports triton.

Names follow flash-linear-attention: ``i_`` program and loop indices, ``o_`` offsets, ``m_`` masks,
``p_`` pointers, ``b_`` blocks of values. Launchers say whether multiply-adds may be fused
(``enable_fp_fusion``), whose default differs between versions of Triton.
"""
