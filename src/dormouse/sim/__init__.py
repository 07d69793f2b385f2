"""A discrete-event simulator of clusters that serve sleeping models. It runs the code of schedule/ as it is.

    scenario (YAML) -> nodes, models, trace -> events -> what every request met -> report

Nothing here knows real time or real files, but for the scenario and the traces that it names.
"""
