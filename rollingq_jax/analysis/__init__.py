"""Looking at a run: statistics, probes under corruption, figures and the report.

Everything here takes plain arrays, or rows as they stand in ``metrics.jsonl``, so that a finished
run can be looked at again without the training code.
"""
