"""The Unix socket between the command line and the daemons."""
