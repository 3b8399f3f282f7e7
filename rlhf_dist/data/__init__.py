"""Sources → records → token ids and loss masks → batches.

    file, directory, hub name ─ files.py ─▶ rows ─ reader.py, kinds.py ─▶ records ─ splits.py ─▶ train | held-out records
    records ─ tokenization.py, encoding.py ─▶ tokens on disk ─ datasets.py ─▶ batches, in the order of sampler.py, mixing.py

`loading.py` does all of it for a run. Invalid rows: `bad_rows.py`.
"""
