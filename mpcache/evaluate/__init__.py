"""Answer quality of each policy at equal budgets, gated on the full cache: `mpcache eval`.

`tasks` makes questions whose answers are known, `score` asks them, `sweep` does so for every policy
and budget, `secure` through the parties, and `results`, `quality_tables` and `plot` say what came out.
`eval_command` is the command line.
"""
