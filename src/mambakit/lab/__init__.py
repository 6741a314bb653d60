"""The lab: synthetic tasks, ablations, mechanisms, and the background of state spaces as code."""
