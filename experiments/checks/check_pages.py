"""Reads report pages as an accessibility checker and a reader do: on a wide screen, a phone, and in the dark.

    pip install playwright axe-playwright-python
    python experiments/checks/check_pages.py WORKDIR/report.html REPORT/comparison.html --screenshots FOLDER

axe-core looks at each page for what WCAG 2 and good practice ask for. Beside it, labels of a figure that lie
over each other, that are cut off at its edge, or that are shown with less than 8 pixels, and pages that are
wider than their screen, are errors. Chromium is the one of playwright, or the one named with --chromium.
"""

import argparse
import json
import pathlib
import shutil

from lct.cli.main import needs, run_script

SCREENS = {'wide': (1440, 900, 'light'), 'phone': (390, 844, 'light'), 'dark': (1440, 900, 'dark'),
           'dark_phone': (390, 844, 'dark')}
LABELS = '''() => {
  const found = [];
  if (document.documentElement.scrollWidth > window.innerWidth + 1)
    found.push(`the page is ${document.documentElement.scrollWidth} pixels wide`);
  document.querySelectorAll('svg').forEach((svg, number) => {
    const frame = svg.getBoundingClientRect();
    const labels = [...svg.querySelectorAll('text')].filter(one => one.textContent.trim());
    const boxes = labels.map(one => one.getBoundingClientRect());
    labels.forEach((one, i) => {
      const box = boxes[i], name = `figure ${number + 1}: the label "${one.textContent.trim()}"`;
      const scale = frame.width / svg.viewBox.baseVal.width || 1;
      const size = parseFloat(getComputedStyle(one).fontSize) * scale;
      if (size < 8) found.push(`${name} has ${size.toFixed(1)} pixels`);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
          || box.bottom > frame.bottom + 1) found.push(`${name} is cut off`);
      for (let j = 0; j < i; j++) {
        const other = boxes[j];
        const wide = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const high = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (wide > 2 && high > 3)
          found.push(`${name} lies over "${labels[j].textContent.trim()}"`);
      }
    });
  });
  return found;
}'''


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pages', nargs='+', type=pathlib.Path)
    parser.add_argument('--screenshots', type=pathlib.Path, help='folder for pictures of all pages')
    parser.add_argument('--chromium', default=shutil.which('chromium'), help='program; default: on the path')
    parser.add_argument('--output', type=pathlib.Path, help='for the result as JSON')
    args = parser.parse_args()
    with needs('playwright axe-playwright-python'):
        from axe_playwright_python.sync_playwright import Axe
        from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=['--no-sandbox'])
        rows = [check(browser, Axe(), path, screen, args.screenshots)
                for path in args.pages for screen in SCREENS]
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + '\n')
    raise SystemExit(any(row['violations'] or row['labels'] for row in rows))


def check(browser, axe, path, screen, screenshots):
    """Print and return what is wrong with a page on a screen."""
    width, height, scheme = SCREENS[screen]
    page = browser.new_page(viewport={'width': width, 'height': height}, color_scheme=scheme)
    page.goto(path.resolve().as_uri())
    found = axe.run(page).response
    violations = [f"{one['id']} ({one['impact']}): {one['help']}, {len(one['nodes'])} places, such as "
                  f"{one['nodes'][0]['html'][:160]}" for one in found['violations']]
    labels = page.evaluate(LABELS)
    if screenshots:
        screenshots.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=screenshots / f'{path.stem}_{screen}.png', full_page=True)
    page.close()
    print(f"{path.name}, {screen}: {len(found['passes'])} rules of axe-core {found['testEngine']['version']} "
          f'pass, {len(violations)} do not; {len(labels)} labels are wrong', *violations, *labels, sep='\n  ')
    return {'page': path.name, 'screen': screen, 'axe': found['testEngine']['version'],
            'passes': len(found['passes']), 'violations': violations, 'labels': labels}


if __name__ == '__main__':
    run_script(main)
