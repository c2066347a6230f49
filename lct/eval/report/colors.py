"""The colours that all figures share."""

from matplotlib.colors import LinearSegmentedColormap

INK, GREY = '#10241F', '#5A6462'  # of text, of notes
LINE_COLORS = ('#8A8F98', '#1F5FBF', '#0B9E74', '#C2573A')  # the first is for references
RAMP = LinearSegmentedColormap.from_list('score', ['#F0496E', '#EBB839', '#0CD79F'])  # of scores 0..1
ON_RAMP = '#10241E'  # of text on the ramp, the same in light and dark
VARIABLES = {'ink': INK, 'grey': GREY, **{f'line{i}': color for i, color in enumerate(LINE_COLORS)}}  # of CSS
DARK = {'ink': '#E4ECE9', 'grey': '#A5B1AE', 'line0': '#A9B0BA', 'line1': '#7FB2FF', 'line2': '#3FD0A4',
        'line3': '#FF9A7A'}  # their values on a dark page
