"""What is counted and how it is shown. Imports the core only."""
