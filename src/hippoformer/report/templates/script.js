"use strict";
(() => {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const paint = (name) => { root.dataset.theme = name; };
  paint(dark.matches ? "dark" : "light");
  dark.addEventListener("change", (event) => paint(event.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => paint(root.dataset.theme === "dark" ? "light" : "dark"));

  const text = document.getElementById("text");
  if (!text) return;
  const data = JSON.parse(document.getElementById("trace").textContent);
  const tokens = Array.from(text.querySelectorAll(".t"));
  const detail = document.getElementById("detail");
  const onlyFar = document.getElementById("only-far");
  let shown = -1;

  const make = (tag, className, content) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (content !== undefined) element.textContent = content;
    return element;
  };
  const visible = (string) => string.trim() === "" ? string.replace(/ /g, "␣").replace(/\n/g, "⏎") : string.trim();
  const percent = (value) => {
    const share = 100 * value;
    if (share >= 9.95) return `${share.toFixed(0)} %`;
    return share >= 0.001 ? `${Number(share.toPrecision(2))} %` : "< 0.001 %";
  };
  const signed = (value, digits = 2) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
  const factor = (value) => value >= 1000 ? Math.round(value).toLocaleString("en") : value >= 10 ? value.toFixed(0) : value.toFixed(1);
  const marks = () => tokens.filter((t) => t.classList.contains("far") || (t.classList.contains("near") && !onlyFar.checked));

  const facts = (rows) => {
    const list = make("dl");
    for (const [name, value] of rows) list.append(make("dt", "", name), make("dd", "", value));
    return list;
  };

  const episode = (from) => {
    const quote = make("blockquote");
    const before = tokens.slice(Math.max(0, from - 12), from).map((t) => t.textContent).join("");
    const after = tokens.slice(from + 1, from + 7).map((t) => t.textContent).join("");
    quote.append(`…${before}`, make("mark", "", tokens[from].textContent), `${after}…`);
    return quote;
  };

  /* The whole word that a token is a part of, the token marked. */
  const word = (number) => {
    const heading = make("p", "word");
    const own = tokens[number].textContent;
    if (own.trim() === "") {
      heading.textContent = visible(own);
      return heading;
    }
    const glued = (i) => i > 0 && i < tokens.length && /^\S/.test(tokens[i].textContent) && /\S$/.test(tokens[i - 1].textContent);
    let first = number, last = number;
    while (glued(first)) first -= 1;
    while (glued(last + 1)) last += 1;
    const joined = (from, to) => tokens.slice(from, to).map((t) => t.textContent).join("");
    heading.append(joined(first, number).trimStart(), make("mark", "", own.trim()), joined(number + 1, last + 1).trimEnd());
    return heading;
  };

  const show = (number) => {
    if (number === shown) return;
    text.querySelectorAll(".here, .from").forEach((t) => t.classList.remove("here", "from"));
    shown = number;
    tokens[number].classList.add("here");
    const parts = [word(number)];
    const on = data.log_p[number], off = data.log_p_off[number], from = data.episode[number];
    const rows = [["salience", data.salience[number].toFixed(2) + (data.salience[number] > 0.5 ? ", tagged" : "")]];
    if (on !== null) {
      const change = on - off, up = change > 0;
      const verdict = Math.abs(change) < 0.1 ? "recall changed next to nothing"
        : `${factor(Math.exp(Math.abs(change)))} × ${up ? "likelier" : "less likely"} by recall`;
      parts.push(make("p", Math.abs(change) < 0.1 ? "verdict" : `verdict ${up ? "up" : "down"}`, verdict));
      rows.push(["probability", `${percent(Math.exp(off))} → ${percent(Math.exp(on))}`]);
      rows.push(["change of log p", `${signed(change)} nats`]);
    }
    if (from !== null) {
      tokens[from].classList.add("from");
      const back = number - from;
      parts.push(make("p", "back", `What came to mind stood ${back.toLocaleString("en")} token${back === 1 ? "" : "s"} back, `
        + (data.stored[number] ? "beyond the window:" : "within the window:")), episode(from));
      rows.push(["its weight", percent(data.weight[number])]);
      rows.push(["left to recall", percent(data.mixture[number] * (1 - data.nothing[number]))]);
      rows.push(["voted for this word", percent(data.hit[number])]);
    }
    parts.push(facts(rows));
    if (from !== null) {
      const jump = make("button", "", "Show it in the text");
      jump.type = "button";
      jump.addEventListener("click", () => reveal(from));
      parts.push(jump);
    }
    detail.replaceChildren(...parts);
  };

  const reveal = (number) => {
    const box = tokens[number].getBoundingClientRect(), frame = text.getBoundingClientRect();
    text.scrollTop += box.top - frame.top - frame.height / 3;
    /* On a narrow screen the card lies over the lower half. */
    const now = tokens[number].getBoundingClientRect();
    if (window.matchMedia("(max-width: 56rem)").matches && (now.top < 80 || now.bottom > 0.45 * window.innerHeight)) {
      window.scrollBy(0, now.top - 0.25 * window.innerHeight);
    }
  };

  const visit = (target) => {
    reveal(Number(target.dataset.i));
    tokens.forEach((t) => t.removeAttribute("tabindex"));
    target.tabIndex = 0;
    target.focus({ preventScroll: true });
    show(Number(target.dataset.i));
  };

  const go = (step) => {
    const all = marks();
    if (!all.length) return;
    const at = shown < 0 ? (step > 0 ? -1 : tokens.length) : shown;
    const following = step > 0 ? all.find((t) => Number(t.dataset.i) > at) : all.findLast((t) => Number(t.dataset.i) < at);
    visit(following || (step > 0 ? all[0] : all[all.length - 1]));
  };

  /* From the one that recall helped most to the ones it helped less, and round again. */
  const gain = (t) => data.log_p[t.dataset.i] - data.log_p_off[t.dataset.i];
  const strongest = () => {
    const all = marks().sort((a, b) => gain(b) - gain(a));
    if (all.length) visit(all[(all.indexOf(tokens[shown]) + 1) % all.length]);
  };

  const pointed = (event) => {
    const token = event.target.closest(".t");
    if (token) show(Number(token.dataset.i));
  };
  for (const kind of ["pointerover", "focusin", "click"]) text.addEventListener(kind, pointed);
  text.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      event.preventDefault();
      go(event.key === "ArrowRight" ? 1 : -1);
    }
  });
  document.getElementById("next").addEventListener("click", () => go(1));
  document.getElementById("previous").addEventListener("click", () => go(-1));
  document.getElementById("strongest").addEventListener("click", strongest);

  const settle = () => {
    text.classList.toggle("salient", document.getElementById("show-salience").checked);
    text.classList.toggle("recalled", document.getElementById("show-recall").checked);
    text.classList.toggle("far-only", onlyFar.checked);
  };
  for (const id of ["show-salience", "show-recall", "only-far"]) document.getElementById(id).addEventListener("change", settle);
  settle();
  const first = marks()[0];
  if (first) first.tabIndex = 0;
})();
