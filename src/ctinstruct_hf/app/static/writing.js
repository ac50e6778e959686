// The report: written, linked with findings, corrected sentence by sentence.
"use strict";

async function report() {
  const result = await work({ kind: "report" });
  if (result) showReport(await call("GET", `api/studies/${page.study.study}/results`));
}

function showReport({ report: text, findings, sentences }) {
  ground(text || "The model wrote nothing.", findings);
  $("correct").hidden = !sentences.length;
  $("sentences").replaceChildren(...sentences.map((sentence) => rowOf(sentence, sentences)));
}

function ground(text, rows) {
  // The report, whose sentences lead to the slice of what they state.
  const spans = new Map();
  for (const [name, row] of Object.entries(rows)) {
    for (const { start, end } of row.sentences) {
      if (!spans.has(start)) spans.set(start, { start, end, names: [] });
      spans.get(start).names.push(name);
    }
  }
  const characters = [...text]; // the server counts characters, not halves of pairs
  const parts = [];
  let done = 0;
  for (const { start, end, names } of [...spans.values()].sort((one, other) => one.start - other.start)) {
    if (start < done) continue;
    const sentence = make("span");
    for (const name of names) sentence.append(make("i", undefined, { "data-finding": anchor("sentence", name) }));
    sentence.append(characters.slice(start, end).join(""));
    const stated = names.find((name) => rows[name].report === "present" && rows[name].mask && rows[name].mask.voxels);
    if (stated) {
      lead(sentence, stated, "row");
      sentence.dataset.finding = anchor("sentence", stated);
    }
    parts.push(characters.slice(done, start).join(""), sentence);
    done = end;
  }
  $("text").replaceChildren(...parts, characters.slice(done).join(""));
}

function rowOf(sentence, all) {
  // A sentence to accept, change or strike; every change is kept at once.
  const row = make("li");
  const where = sentence.section ? `${sentence.section}: ` : "";
  const text = make("textarea", undefined, { rows: 2, "aria-label": `${where}${sentence.original}` });
  text.value = sentence.text;
  const state = make("span", undefined, { class: "state" });
  const show = () => {
    row.dataset.state = sentence.state;
    state.textContent = sentence.state === "open" ? "" : sentence.state;
  };
  const set = async (change) => {
    Object.assign(sentence, change);
    show();
    try {
      const body = { sentences: all.map((one) => ({ text: one.text, state: one.state })) };
      await call("PUT", `api/studies/${page.study.study}/review`, body);
    } catch (error) {
      complain(error);
    }
  };
  text.addEventListener("change", () => set({ text: text.value, state: text.value === sentence.original ? "open" : "changed" }));
  const tools = make("div", undefined, { class: "row turn" });
  tools.append(
    button("Accept", () => set({ state: sentence.text === sentence.original ? "accepted" : "changed" }), { "aria-label": `Accept: ${sentence.original}` }),
    button("Strike", () => set({ state: "struck" }), { "aria-label": `Strike: ${sentence.original}` }),
    button("Original", () => {
      text.value = sentence.original;
      set({ text: sentence.original, state: "open" });
    }, { "aria-label": `Back to the original: ${sentence.original}` }),
    state,
  );
  if (sentence.section) row.append(make("span", sentence.section, { class: "small" }));
  row.append(text, tools);
  show();
  return row;
}

function startWriting() {
  $("report").addEventListener("click", guarded(report));
}
