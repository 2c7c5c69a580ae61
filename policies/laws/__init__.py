"""Laws that predict loss, quality, cost and time: one small typed object per law.

Each has `predict` and, where its constants must be fitted, `fit` with bootstrap intervals. Sources:
Sengupta et al., "Enough of Scaling LLMs! Let's Focus on Downscaling" (ICML 2025), whose equation
numbers are meant where none other is named; Bian et al. 2025; Que et al. 2024; Sengupta et al.
2025 ("Compression Laws for Large Language Models"). A constant that is published stands beside its
law as `PUBLISHED`; where none is, there is no default.
"""
