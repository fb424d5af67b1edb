// The read-out of line charts: the values under the pointer, or by arrow keys where a chart has the focus.
for (const figure of document.querySelectorAll('figure.chart')) {
  const svg = figure.querySelector(':scope > svg'), out = figure.querySelector('.readout');
  const cross = svg.querySelector('.cross'), d = JSON.parse(figure.querySelector('script').textContent);
  const [left, , right] = d.box, at = (x) => left + (x - d.x[0]) / (d.x[1] - d.x[0]) * (right - left);
  const format = (v) => {
    if (v === null) return 'not finite';
    const size = Math.abs(v);
    return size > 0 && (size < 1e-3 || size >= 1e5) ? v.toExponential(2) : String(Number(v.toPrecision(4)));
  };
  const nearest = (xs, x) => xs.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best), 0);
  let index = null;
  const show = (i) => {
    const lead = d.series[0], x = lead.x[index = Math.max(0, Math.min(lead.x.length - 1, i))];
    const place = {x1: at(x), x2: at(x), visibility: 'visible'};
    for (const [name, value] of Object.entries(place)) cross.setAttribute(name, value);
    const names = d.series.length > 1;
    const values = d.series.map((s) => (names ? `${s.name} ` : '') + format(s.y[nearest(s.x, x)]));
    out.textContent = `${d.at} ${x}: ${values.join(', ')}`;
  };
  const hide = () => { index = null; out.textContent = ''; cross.setAttribute('visibility', 'hidden'); };
  svg.addEventListener('pointermove', (e) => {
    const p = new DOMPoint(e.clientX, e.clientY).matrixTransform(svg.getScreenCTM().inverse());
    show(nearest(d.series[0].x, d.x[0] + (p.x - left) / (right - left) * (d.x[1] - d.x[0])));
  });
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('blur', hide);
  svg.addEventListener('keydown', (e) => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[e.key];
    if (step) { show(index === null ? (step > 0 ? 0 : d.series[0].x.length - 1) : index + step); e.preventDefault(); }
  });
}
