"""`lvd estimate`: what a recipe will take, stage by stage, before anything starts.

``counting`` says how many rows each source has, ``flow`` how many each stage sees and lets through, ``work`` what a
stage does to them in units that were measured, ``rates`` what a unit costs and where that number comes from, ``sums``
adds up, ``table`` prints. Nothing is started, written, loaded or asked over a network.
"""
