"""The command line `reeve`, for operators."""
