// The list of generations: choose, filter, search. Text only ever reaches the page through `textContent`.
(() => {
  const root = document.querySelector('.browse');
  if (!root) return;
  const $ = (name) => root.querySelector('.browse-' + name);
  const {models, cells} = JSON.parse($('data').textContent);
  const PAGE = 50;
  let shown = PAGE;

  function element(parent, tag, name, text) {
    const one = document.createElement(tag);
    if (name) one.className = name;
    if (text !== undefined) one.textContent = text;
    parent.append(one);
    return one;
  }
  function option(select, value, text) {
    element(select, 'option', '', text).value = value;
  }
  cells.forEach((cell, i) => option($('cell'), i, cell.name));
  option($('which'), 'all', 'all');
  models.forEach((model, i) => {
    option($('which'), `right ${i}`, `${model} right`);
    option($('which'), `wrong ${i}`, `${model} wrong`);
  });
  if (models.length > 1) {
    option($('which'), 'differ', 'right by one model only');
  }

  function passes(row, which, text) {
    const [kind, model] = which.split(' ');
    const answers = row.answers;
    if (kind === 'right' && !answers[model]?.right) return false;
    if (kind === 'wrong' && (!answers[model] || answers[model].right)) return false;
    if (kind === 'differ' && new Set(answers.map((one) => one?.right)).size < 2) return false;
    if (!text) return true;
    return [row.prompt, row.reference, ...answers.map((one) => one?.text ?? '')].some((part) => part.toLowerCase().includes(text));
  }
  // The text with what is searched for marked, by pieces of text and <mark> elements.
  function marked(parent, content, text) {
    const pre = element(parent, 'pre');
    if (!text) { pre.textContent = content; return; }
    const lower = content.toLowerCase();
    let from = 0;
    for (let at = lower.indexOf(text); at >= 0 && lower.length === content.length; at = lower.indexOf(text, from)) {
      pre.append(content.slice(from, at));
      element(pre, 'mark', '', content.slice(at, at + text.length));
      from = at + text.length;
    }
    pre.append(content.slice(from));
  }
  function part(body, title, content, text, whole) {
    const box = element(body, 'div', whole ? 'browse-whole' : '');
    element(box, 'h4', '', title);
    marked(box, content, text);
  }
  function body(details, row, text) {
    const inside = element(details, 'div', 'browse-body');
    part(inside, 'Prompt', row.prompt, text, true);
    if (row.reference) part(inside, 'Reference', row.reference, text, true);
    row.answers.forEach((one, i) => {
      if (!one) return;
      const offer = one.offer ? `, answer ${one.offer}` : '';
      part(inside, `${models[i]}: ${one.right ? 'right' : 'wrong'}, ${one.tokens} tokens${offer}`, one.text, text, false);
    });
  }
  function entry(row, text) {
    const details = element($('rows'), 'details');
    const summary = element(details, 'summary');
    element(summary, 'span', 'browse-number', row.sample ? `${row.row}.${row.sample}` : String(row.row));
    element(summary, 'span', 'browse-head', row.head);
    row.answers.forEach((one, i) => {
      if (!one) return;
      const label = models.length > 1 ? `${String.fromCharCode(65 + i)} ${one.right ? 'right' : 'wrong'}` : one.right ? 'right' : 'wrong';
      const mark = element(summary, 'span', `browse-mark browse-${one.right ? 'right' : 'wrong'}`, label);
      mark.title = models[i];
    });
    details.addEventListener('toggle', () => {
      if (details.open && details.children.length === 1) body(details, row, text);
    });
  }
  function draw() {
    const cell = cells[$('cell').value || 0];
    const text = $('text').value.toLowerCase();
    const found = cell ? cell.rows.filter((row) => passes(row, $('which').value, text)) : [];
    $('rows').replaceChildren();
    found.slice(0, shown).forEach((row) => entry(row, text));
    $('more').hidden = found.length <= shown;
    $('count').textContent = `${found.length} of ${cell ? cell.rows.length : 0}`;
  }
  for (const name of ['cell', 'which', 'text']) {
    $(name).addEventListener('input', () => { shown = PAGE; draw(); });
  }
  $('more').addEventListener('click', () => { shown += PAGE; draw(); });
  draw();
})();
