"""Damaged models, importance files and journals through the commands, and the C kernels under sanitizers.

``seeds`` makes small intact inputs and ``targets`` names the commands that read them; ``mutate`` damages them, as trees
where ``formats`` knows their structure and as bytes elsewhere; ``judge`` runs a command in this process and says
whether what came of it is fine.  ``worker`` does so in a process of its own with little memory, ``pool`` watches it;
``minimise`` makes a failure small and ``corpus`` keeps it for ``tests/test_fuzz.py``.  ``kernels`` is the other half.
"""
