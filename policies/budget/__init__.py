"""The budget controller: how much quality a request deserves at today's price.

`candidates` are the plans to choose from and their expected costs, `prices` says what
traffic is to come, holds the targets and finds the dual price of each, `controller` chooses.
"""
