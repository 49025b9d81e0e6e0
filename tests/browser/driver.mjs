// Drives Chromium for the tests in tests/browser.rs: takes an order a line on standard input, as JSON,
// and writes its answer as a line. Ends with its input.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

const [modules, executablePath] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const contexts = [];
const pages = [];
// Errors that a page has logged, and the requests that left its origin.
const faults = [];

// Keeps each time that the page has moved what it had shown, and what it was.
const watchShifts = () => {
  window.shifts = [];
  const place = ({ x, y, width, height }) => `${x},${y} ${width}x${height}`;
  const add = (list) => {
    for (const { value, hadRecentInput, sources } of list.getEntries()) {
      if (hadRecentInput) continue;
      // Generated content has no node.
      const what = sources.map(({ node, previousRect, currentRect }) => {
        const html = node?.outerHTML ?? node?.parentElement?.outerHTML ?? String(node);
        return `${html.slice(0, 200)} from ${place(previousRect)} to ${place(currentRect)}`;
      });
      window.shifts.push({ value, what });
    }
  };
  new PerformanceObserver(add).observe({ type: "layout-shift", buffered: true });
};

const ORDERS = {
  context: async ({ width, height, scheme, scripts }) => {
    const context = await browser.newContext({
      viewport: { width, height },
      colorScheme: scheme,
      javaScriptEnabled: scripts,
    });
    return contexts.push(context) - 1;
  },
  open: async ({ context, url }) => {
    const page = await contexts[context].newPage();
    const { origin } = new URL(url);
    const number = pages.push(page) - 1;
    page.on("pageerror", ({ message }) => faults.push(`page ${number}: ${message}`));
    page.on("console", (line) => {
      // A node that is away is no fault of the page.
      if (line.type() === "error" && !line.text().includes("net::ERR")) faults.push(`page ${number}: ${line.text()}`);
    });
    page.on("request", (request) => {
      const to = new URL(request.url());
      if (to.origin !== origin && to.protocol !== "data:") faults.push(`page ${number}: a request to ${to}`);
    });
    await page.addInitScript(watchShifts);
    await page.goto(url);
    return number;
  },
  // A page with this content at any address, such as one of another site.
  serve: async ({ context, url, html }) => {
    const page = await contexts[context].newPage();
    await page.route(url, (route) => route.fulfill({ contentType: "text/html", body: html }));
    await page.goto(url);
    return pages.push(page) - 1;
  },
  evaluate: ({ page, script }) => pages[page].evaluate(script),
  // Not with `waitForFunction`: the policy of the page forbids what that does with a text.
  wait: async ({ page, script, timeout }) => {
    const until = performance.now() + timeout;
    for (;;) {
      const found = await pages[page].evaluate(script);
      if (found) return found;
      if (performance.now() > until) throw new Error(`not within ${timeout} ms`);
      await sleep(20);
    }
  },
  click: ({ page, selector }) => pages[page].click(selector),
  fill: ({ page, selector, text }) => pages[page].fill(selector, text),
  press: ({ page, key }) => pages[page].keyboard.press(key),
  hover: async ({ page, selector, part }) => {
    const { width, height } = await pages[page].locator(selector).first().boundingBox();
    await pages[page].locator(selector).first().hover({ position: { x: part * width, y: height / 2 } });
  },
  close: ({ page }) => pages[page].close(),
  picture: async ({ page, path, height }) => {
    const { width } = pages[page].viewportSize();
    const clip = height ? { x: 0, y: 0, width, height } : undefined;
    await pages[page].screenshot({ path, fullPage: true, clip });
  },
  violations: async ({ page }) => {
    await pages[page].evaluate(`${axe}; undefined`);
    const { violations } = await pages[page].evaluate("axe.run()");
    return violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map(({ html }) => html.slice(0, 200)).join("; ")}`);
  },
  faults: () => faults.splice(0),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { order, ...members } = JSON.parse(line);
  let answer;
  try {
    answer = { done: (await ORDERS[order](members)) ?? null };
  } catch ({ message }) {
    answer = { failed: message };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await browser.close();
