// Questions: asked, followed while they are answered, stopped.
"use strict";

async function work(words, written) {
  // Ask for something and wait for it; null where it was cancelled. `written` is called with the answer so far.
  calm();
  $("remarks").replaceChildren();
  for (;;) {
    try {
      const { job } = await call("POST", `api/studies/${page.study.study}/jobs`, words);
      return await follow(job, written);
    } catch (error) {
      if (!/try again later/.test(error.message)) throw error;
      $("progress").textContent = "The server is busy; trying again …";
      await wait(3000);
    }
  }
}

async function follow(job, written) {
  const study = page.study.study;
  page.job = job;
  $("cancel").hidden = false;
  const start = Date.now();
  let step = "";
  const clock = () => ($("progress").textContent = `${step} … ${Math.round((Date.now() - start) / 1000)} s`);
  const timer = setInterval(clock, 1000);
  let state;
  try {
    state = await new Promise((done, fail) => {
      const events = new EventSource(`api/jobs/${job}/events`); // it goes on in a hidden tab
      let broken = 0;
      events.addEventListener("message", (event) => {
        broken = 0;
        const now = JSON.parse(event.data);
        step = now.ahead ? `${now.ahead} before this` : now.step;
        clock();
        if (written && now.text) written(now.text);
        if (now.status === "queued" || now.status === "running") return;
        events.close();
        done(now);
      });
      events.addEventListener("error", () => {
        if (events.readyState === EventSource.CLOSED) fail(new Error("The server does not know this question any more."));
        else if (++broken > 5) {
          events.close();
          fail(new Error(NO_ANSWER));
        }
      });
    });
  } finally {
    clearInterval(timer);
    page.job = null;
    $("cancel").hidden = true;
    $("progress").textContent = "";
  }
  if (state.result) for (const note of state.result.warnings || []) $("remarks").append(make("p", note, { class: "warning" }));
  if (state.status === "failed") throw new Error(state.error);
  if (state.status === "cancelled") $("progress").textContent = "Cancelled.";
  return state.status === "done" && page.study && page.study.study === study ? state.result : null;
}

async function cancel() {
  if (page.job) await call("DELETE", `api/jobs/${page.job}`).catch(() => {});
}

async function withoutButtons(buttons, action) {
  buttons.forEach((one) => (one.disabled = true));
  try {
    await action();
  } catch (error) {
    complain(error);
  }
  buttons.forEach((one) => (one.disabled = false));
}

function guarded(action) {
  // One thing at a time from one page.
  return async (event) => {
    if (event) event.preventDefault();
    const buttons = ["mark", "diagnose", "report", "compare"].map($).concat([...$("ask").querySelectorAll("button")]);
    if (page.job || buttons[0].disabled) return;
    await withoutButtons(buttons, action);
  };
}

function addTurn(question, answer) {
  // A question and its answer in the chat; the answer's element and its row of buttons.
  const said = make("p", answer, { class: "said" });
  const tools = make("div", undefined, { class: "row turn" });
  tools.append(
    button("Copy", () => navigator.clipboard.writeText(said.textContent).catch(complain), { "aria-label": `Copy the answer to: ${question}` }),
    button("Ask again", guarded(() => ask(question)), { "aria-label": `Ask again: ${question}` }),
  );
  $("chat").append(make("p", question, { class: "asked" }), said, tools);
  tools.scrollIntoView({ block: "nearest" });
  return { said, tools };
}

async function ask(question) {
  if (!question) return;
  const { said, tools } = addTurn(question, "…");
  tools.prepend($("cancel")); // beside the answer that it stops
  try {
    const result = await work({ kind: "ask", question }, (text) => (said.textContent = text));
    said.textContent = result ? result.answer || "The model said nothing." : "Cancelled.";
    if (result && Object.keys(result.masks).length) await drawMasks();
  } catch (error) {
    said.textContent = "No answer.";
    throw error;
  } finally {
    document.querySelector(".working").append($("cancel"));
  }
}

function startAsking() {
  $("ask").addEventListener("submit", guarded(() => {
    const question = $("question").value.trim();
    $("question").value = "";
    return ask(question);
  }));
  $("suggested").append(...page.model.questions.map((question) => button(question, guarded(() => ask(question)))));
  $("cancel").addEventListener("click", cancel);
}
