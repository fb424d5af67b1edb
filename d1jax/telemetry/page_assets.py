"""Style and script of the report page, kept apart from the Python that fills it. All is inlined, nothing fetched."""

STYLE = """
:root{--ink:#1d2126;--soft:#5b6470;--edge:#dedcd5;--rule:#ebe9e3;--ground:#fff;--page:#faf9f6;--accent:#1f4f8f;
  --before:#6d7580;--good:#1f6f4a;--bad:#a4372b;--badground:#f8e1dc;--note:#fdf3dc;--s1:#1f5fa8;--s2:#b4540f;
  --s3:#2a7a55;--s4:#7a4a9e;--s5:#5b6470}
@media screen and (prefers-color-scheme:dark){
  :root{--ink:#e6e6e3;--soft:#a2a9b3;--edge:#3a3f47;--rule:#2c3037;--ground:#1d2025;--page:#16181c;--accent:#8fbcf0;
  --before:#9aa2ad;--good:#7ccba2;--bad:#f09a8c;--badground:#4a2723;--note:#3a3120;--s1:#7fb2ec;--s2:#e79a5c;
  --s3:#7ccba2;--s4:#c39be6;--s5:#a2a9b3}
}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:56px 28px 72px}
h1,h2,.verdict{font-family:Charter,"Iowan Old Style","Palatino Linotype",Palatino,Georgia,"Liberation Serif",serif;
  font-weight:600}
h1{font-size:19px;margin:0;overflow-wrap:anywhere}
header .task{color:var(--soft);margin:2px 0 20px;font-size:15px}
.verdict{font-size:clamp(25px,4.2vw,38px);line-height:1.22;letter-spacing:-.008em;margin:0 0 14px;max-width:25em;
  text-wrap:balance;font-weight:500}
.context{color:var(--soft);margin:0;max-width:52em}
h2{font-size:23px;line-height:1.3;margin:0 0 6px}
h3{font-size:15px;margin:0;font-weight:600}
section{margin-top:60px}
.lead{color:var(--soft);margin:0 0 18px;max-width:52em}
.notice{background:var(--note);border-radius:6px;padding:10px 14px;margin:24px 0 0;font-size:15px}
.notice ul{margin:0;padding-left:1.2em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums lining-nums}
.scroll{overflow-x:auto}
th,td{padding:7px 14px 7px 0;text-align:left;vertical-align:middle;font-weight:400}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--soft);font-size:14px;border-bottom:1px solid var(--ink);vertical-align:bottom}
.num{text-align:right;white-space:nowrap}
tbody.set tr:first-child th{padding-top:20px;font-weight:600}
tbody tr:not(.head) th,tbody tr:not(.head) td{border-top:1px solid var(--rule)}
tr.stage td,tr.stage th{font-weight:500}
tr.last td.rate{color:var(--accent);font-weight:700}
tr.baseline{color:var(--soft)}
.results{width:100%}
.results .ci{color:var(--soft);font-weight:400}
.results .plot{width:34%;min-width:170px;padding-top:0;padding-bottom:0}
.results thead .plot{padding-bottom:7px}
.interval{display:block;width:100%;height:auto;overflow:visible}
.bar{stroke:var(--before);stroke-width:2.2}
.mark{fill:var(--before)}
.bar.last{stroke:var(--accent)}
.mark.last{fill:var(--accent)}
.bar.baseline,.mark.baseline{opacity:.75}
.mark.baseline{fill:var(--ground);stroke:var(--before);stroke-width:1.4;opacity:1}
.rule{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
text{font-family:inherit;fill:var(--soft)}
.tick,.label{font-size:10.5px;font-variant-numeric:tabular-nums}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:30px 26px}
figure{margin:0;break-inside:avoid}
.chart,.picture{display:flex;flex-direction:column}
.chart>svg,.picture>svg{margin-top:auto}
.picture>svg{display:block;width:100%;height:auto}
figcaption{display:flex;gap:4px 8px;align-items:baseline;flex-wrap:wrap;min-height:1.6em;margin-bottom:4px}
.name{font-weight:600;font-size:15px}
.hint,.readout{color:var(--soft);font-size:12.5px}
.readout{margin-left:auto;font-variant-numeric:tabular-nums;color:var(--ink)}
.chart>svg{display:block;width:100%;height:auto;border-radius:3px;touch-action:pan-y}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:0 0 4px;padding:0;font-size:12.5px;
  color:var(--soft)}
.legend li{display:inline-flex;gap:6px;align-items:center}
.line{fill:none;stroke-linejoin:round;stroke-linecap:butt}
.raw{stroke-width:.9;opacity:.42}
.bold{stroke-width:1.9}
.s1{stroke:var(--s1)}
.s2{stroke:var(--s2)}
.s3{stroke:var(--s3)}
.s4{stroke:var(--s4)}
.s5{stroke:var(--s5)}
.dot{stroke:var(--page);stroke-width:1}
.dot.s1{fill:var(--s1)}
.dot.s2{fill:var(--s2)}
.dot.s3{fill:var(--s3)}
.dot.s4{fill:var(--s4)}
.dot.s5{fill:var(--s5)}
.heat{fill:var(--s1)}
.frame{fill:none;stroke:var(--edge);stroke-width:1}
.scale{display:flex;align-items:center;gap:6px;margin:0 0 4px;font-size:12.5px;color:var(--soft)}
.scale svg{width:96px;height:10px}
.cross{stroke:var(--ink);stroke-width:.8;stroke-dasharray:2 2}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(500px,100%),1fr));gap:16px}
.samples.texts{grid-template-columns:1fr}
.sample{background:var(--ground);border:1px solid var(--edge);border-radius:8px;padding:14px 16px;break-inside:avoid;
  min-width:0}
.sample>h3{margin-bottom:10px;color:var(--soft);font-weight:500;font-size:13.5px}
.versions{display:flex;flex-wrap:wrap;align-items:end;gap:14px 24px}
.texts .versions{align-items:start}
.texts .versions>*{flex:1 1 280px;min-width:0}
.versions>div{min-width:102px}
.versions h4{font-size:13px;line-height:1.4;font-weight:500;color:var(--soft);margin:0 0 6px}
.ok{color:var(--good);font-weight:600}
.no{color:var(--bad);font-weight:600}
.grid{display:inline-grid;gap:1px;font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
  font-size:14px;line-height:1;background:var(--edge);border:1px solid var(--soft)}
.grid span{width:23px;height:23px;display:grid;place-items:center;background:var(--ground);overflow:hidden}
.grid .given{font-weight:700}
.grid .open{color:var(--accent)}
.grid .wrong{background:var(--badground);color:var(--bad);text-decoration:underline;text-underline-offset:2px}
.typed{display:block;max-width:17ch;margin-top:8px;font:11px/1.4 ui-monospace,Menlo,Consolas,monospace;color:var(--soft);
  overflow-wrap:anywhere}
.grid .small{font-size:8px}
.grid .boxright{margin-right:2px}
.grid .boxdown{margin-bottom:2px}
pre{font:13.5px/1.6 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
  overflow-wrap:anywhere;margin:0}
.sample pre{max-height:36em;overflow:auto}
details{border-top:1px solid var(--edge);padding:10px 0}
details:last-of-type{border-bottom:1px solid var(--edge)}
summary{cursor:pointer;font-weight:600}
details>pre,details>.samples,details>.scroll{margin-top:12px}
.share{width:150px}
.share svg{display:block;width:100%;height:10px}
.share rect{fill:var(--s1)}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
footer{margin-top:56px;color:var(--soft);font-size:14px}
@media (max-width:640px){
  main{padding:28px 16px 48px}
  section{margin-top:44px}
  .results .ci{display:block;font-size:13.5px}.results .kind{display:none}
  th,td{padding-right:10px}
  /* All numbers in the width of a phone; what the picture of an interval shows is written beside the rate. */
  .results{font-size:13.5px}
  .results .plot,#results .lead{display:none}
  .log .tick,.log .label{font-size:20px}
  .results th,.results td{padding-right:7px}
  .results thead th{font-size:12px;white-space:normal;overflow-wrap:break-word}
  .results .ci{font-size:12px}
}
@media print{
  body{background:#fff;font-size:11pt}
  main{max-width:none;padding:0}
  section{margin-top:28px}
  .hint,.readout{display:none}
  .sample pre{max-height:none}
  h2{break-after:avoid}
  .panels{grid-template-columns:repeat(3,1fr)}
}
"""

SCRIPT = r"""
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
addEventListener('beforeprint', () => { for (const d of document.querySelectorAll('details')) d.open = true; });
"""
