"""Where a run is recorded: JSONL, W&B, ledger, report, energy."""
