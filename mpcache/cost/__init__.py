"""What an answer costs, exactly and before anyone runs it: rounds, bytes, work and modelled time.

`reader` reads the decode program by shapes, `pricing` prices a policy with it, `tally` sums what was
counted, `rates` turns counts into milliseconds, and `choose` picks the protocol that is the quickest.
"""
