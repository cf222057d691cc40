"""One small module per verb: parse, call, print. Nothing heavy is imported at the top."""
