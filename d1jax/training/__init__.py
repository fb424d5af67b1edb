"""What every training algorithm shares: context of a run, optimizer, log, resume, stop."""
