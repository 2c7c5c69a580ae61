"""How good a router is, measured offline on outcomes.

`metrics` the field's numbers, `protocols` what is trained on and what is tested on, `overlap` the
check that no test query was seen, `baselines` what to compare with, `harness` one run of all of
it, `report` tables and plots.
"""
