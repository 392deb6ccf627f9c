// Adds to the page a `pre` with what a reader of it would see, as JSON. browser.py says what each key means.
addEventListener("load", () => {
  const all = (query, of = document) => [...of.querySelectorAll(query)];
  const box = (element) => element.getBoundingClientRect();
  const text = (element) => element.textContent.trim();
  const inside = (a, b) =>
    a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
  const meet = (a, b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  // A table that is wider than the window may scroll within its own section.
  const scrolls = (element) => element.closest("section") && box(element.closest("section")).right <= innerWidth + 1;
  const labels = all("svg").map((svg) => all("text", svg));
  const boxes = all("td, th, dd, dt, small, figcaption, h1, h2, p, section, .chart, .cards div");
  const seen = {
    width: innerWidth,
    content: document.documentElement.scrollWidth,
    images: all("img").length,
    broken: all("img").filter((image) => !image.naturalWidth).map((image) => image.alt),
    charts: labels.length,
    cards: Object.fromEntries(all(".cards div").map((d) => [text(d.querySelector("dt")), text(d.querySelector("dd"))])),
    titles: all("h2").map(text),
    outside: labels.flatMap((some) => some.filter((t) => !inside(box(t), box(t.closest("svg"))))).map(text),
    overlapping: labels.flatMap((some) =>
      some.flatMap((a, i) => some.slice(i + 1).filter((b) => meet(box(a), box(b))).map((b) => [text(a), text(b)]))),
    cut: boxes.filter((e) => !e.matches("section") && e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(text),
    beyond: boxes.filter((e) => box(e).right > innerWidth + 1 && !scrolls(e)).map(text),
    colours: ["color", "backgroundColor"].map((name) => getComputedStyle(document.body)[name]),
  };
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
