"""Carbon: from FLOPs to watt-hours to grams of CO2 equivalent, operational and embodied.

LLMCarbon's equations (Faiz et al. 2024; Sengupta et al. 2025, eq. 3-6 and 14-24) with tables of
devices and of the grid; and `economics`, what a device costs. This package does no I/O but reading
those tables and, on request, a file.
"""
