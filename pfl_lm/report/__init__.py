"""What a run has to say, from the ledger's read side."""
