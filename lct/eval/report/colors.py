"""The colours that all figures share."""

from matplotlib.colors import LinearSegmentedColormap

INK, GREY, FAINT = '#10241F', '#5A6462', '#D5DAD8'  # of text, of notes, of rules
LINE_COLORS = ('#8A8F98', '#1F5FBF', '#0B9E74', '#C2573A')  # the first is for references
RAMP = LinearSegmentedColormap.from_list('score', ['#F0496E', '#EBB839', '#0CD79F'])  # of scores 0..1
