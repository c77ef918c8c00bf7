"""The AVMP paper's prototype, quirks included: its allocators, workloads and simulator, to the count.

"Asymmetric Virtual Memory Paging for Hybrid Mamba-Transformer Inference" (arXiv 2605.22416) compares allocators by the
number of their out-of-memory events. The prototype is public (codepawl/cachepawl at 1b677d8, MIT); this is a model of
its behaviour, written anew. What hbmgym itself does with memory is in `hbmgym.memory_backend`, not here.
"""
