"""A website with a known truth: built once from photographs that are installed, served on one loopback port.

Read in this order: ``truth`` (every kind of line that is planted and where it must end), ``config``, ``photos`` (where
pictures come from), ``compose`` (one base picture), ``bodies`` (copies and odd files), ``plant`` (which line is what),
``build`` (the folder), ``serve`` (the server).
"""
