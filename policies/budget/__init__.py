"""The budget controller: how much quality a request deserves at today's price.

`candidates` are the plans to choose from and their expected costs, `pace` says what traffic is to
come, `prices` holds the targets and finds the dual price of each, `controller` chooses.
"""
