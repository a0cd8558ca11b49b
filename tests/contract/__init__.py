"""The promises that every row of an open table keeps, a file for each group of them: a new row is tested by being in its table."""
