"""`mpcache check`: what can go wrong in a run, before it."""
