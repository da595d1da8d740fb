"""The command `quantforge`: results on stdout, the rest on stderr.

Exit codes: 0 done; 1 it could not be done, or a limit was exceeded; 2 the command line is wrong.
"""
