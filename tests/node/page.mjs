// The page in a browser, used by mouse, by keyboard and on a phone.
// usage: node page.mjs ADDRESS CHROMIUM FOLDER-FOR-SCREENSHOTS KEY-OR-NOTHING
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const [, , address, executablePath, folder, key] = process.argv;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const problems = [];

async function opened(options = {}) {
  const context = await browser.newContext({ viewport: { width: 1200, height: 800 }, ...options });
  const page = await context.newPage();
  page.on("pageerror", (error) => problems.push(`${error}`));
  page.on("console", (line) => line.type() === "error" && !line.text().includes("status of 4") && problems.push(line.text()));
  page.on("request", (request) => request.url().startsWith(address) || request.url().startsWith("data:") || request.url().startsWith("blob:") || problems.push(`a request to ${request.url()}`));
  page.on("dialog", (dialog) => dialog.accept());
  await page.goto(`${address}/`);
  await page.waitForFunction(() => document.querySelector("#model").options.length > 0 || document.querySelector("#about").textContent);
  return page;
}

const answers = (page) => page.locator(".message.assistant .body").allInnerTexts();
const idle = (page) => page.waitForFunction(() => !document.querySelector("#send").hidden);
async function ask(page, text) {
  await page.getByLabel("Message", { exact: true }).fill(text);
  await page.keyboard.press("Enter");
}

const checks = {
  async "a message is answered and the figures are shown"() {
    const page = await opened();
    await page.screenshot({ path: `${folder}/empty-light.png` });
    await ask(page, "markdown please");
    await idle(page);
    const body = page.locator(".message.assistant .body");
    assert.equal(await body.locator("code").first().innerText(), "inline");
    assert.equal(await body.locator("pre code").innerText(), "print(1)\nprint(2)");
    assert.deepEqual(await body.locator("li").allInnerTexts(), ["one", "two"]);
    assert.equal(await body.locator("strong").innerText(), "bold");
    assert.equal(await body.locator("a").getAttribute("href"), "https://example.org/x");
    assert.equal(await body.locator("img, script").count(), 0, "HTML in an answer stays text");
    assert.match(await body.innerText(), /<img src=x onerror/);
    assert.match(await page.locator(".figures").innerText(), /tokens\/s · \d+ prompt tokens.* · \d+ generated/);
    assert.equal(await page.locator("#status").innerText(), "The answer is complete.");
    await page.screenshot({ path: `${folder}/answer-light.png` });
    return page;
  },
  async "conversations outlive the page, and can be chosen and deleted"() {
    const page = await opened();
    await ask(page, "first words");
    await idle(page);
    await page.getByRole("button", { name: "New conversation" }).first().click();
    await ask(page, "second words");
    await idle(page);
    await page.reload();
    assert.deepEqual(await page.locator("#list .name").allInnerTexts(), ["second words", "first words"]);
    await page.getByRole("button", { name: "first words", exact: true }).click();
    assert.equal(await page.locator(".message.user .body").innerText(), "first words");
    await page.getByRole("button", { name: "Delete second words" }).click();
    assert.deepEqual(await page.locator("#list .name").allInnerTexts(), ["first words"]);
    await page.getByRole("button", { name: "Delete all" }).click();
    assert.equal(await page.locator("#list .name").count(), 0);
  },
  async "an answer is stopped by the button and by Esc, and stays as far as it came"() {
    const page = await opened();
    for (const stop of [() => page.getByRole("button", { name: "Stop" }).click(), () => page.keyboard.press("Escape")]) {
      await ask(page, "long story");
      await page.waitForFunction(() => [...document.querySelectorAll(".message.assistant .body")].at(-1)?.innerText.length > 20);
      await stop();
      await idle(page);
      assert.match(await page.locator(".figures").last().innerText(), /stopped/);
      assert.ok((await answers(page)).at(-1).length < 900);
    }
  },
  async "the conversation goes on, retry answers again, edit changes what was asked"() {
    const page = await opened();
    await ask(page, "count");
    await idle(page);
    await ask(page, "count");
    await idle(page);
    assert.deepEqual(await answers(page), ["1 so far", "2 so far"]);
    await page.getByRole("button", { name: "Retry" }).click();
    await idle(page);
    assert.deepEqual(await answers(page), ["1 so far", "2 so far"]);
    await page.getByRole("button", { name: "Edit" }).first().click();
    await page.getByLabel("Edit the message").fill("count count count");
    await page.keyboard.press("Enter");
    await idle(page);
    assert.deepEqual(await answers(page), ["3 so far"]);
  },
  async "settings and the system message reach the model"() {
    const page = await opened();
    await page.getByRole("button", { name: "Settings" }).click();
    await page.getByLabel("System message").fill("You are terse.");
    await page.getByLabel("Most tokens").fill("7");
    await page.screenshot({ path: `${folder}/settings.png` });
    await page.getByRole("button", { name: "Save", exact: true }).click();
    await ask(page, "system?");
    await idle(page);
    assert.deepEqual(await answers(page), ["You are"]);
    assert.match(await page.locator(".figures").innerText(), /cut at the limit/);
    await page.getByRole("button", { name: "Settings" }).click();
    await page.getByLabel("Most tokens").fill("");
    await page.keyboard.press("Escape");
    await page.reload();
    await page.getByRole("button", { name: "Settings" }).click();
    assert.equal(await page.getByLabel("Most tokens").inputValue(), "7", "what was cancelled is not kept");
  },
  async "everything is reached by the keyboard"() {
    const page = await opened();
    await page.keyboard.type("keys only");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("second line");
    await page.keyboard.press("Enter");
    await idle(page);
    assert.equal(await page.locator(".message.user .body").innerText(), "keys only\nsecond line");
    assert.equal(await page.evaluate(() => document.activeElement.id), "text");
    const seen = new Set();
    for (let count = 0; count < 40; count++) {
      await page.keyboard.press("Tab");
      seen.add(await page.evaluate(() => document.activeElement.id || document.activeElement.textContent));
    }
    for (const wanted of ["new", "theme", "model", "options", "Copy", "Edit", "Retry", "send", "text"]) assert.ok(seen.has(wanted), `${wanted} in ${[...seen]}`);
    const nameless = await page.evaluate(() => [...document.querySelectorAll("button, input, select, textarea")].filter((item) => !item.hidden && !(item.getAttribute("aria-label") || item.labels?.length || item.textContent.trim())).map((item) => item.outerHTML));
    assert.deepEqual(nameless, []);
  },
  async "a conversation is copied and exported"() {
    const page = await opened({ permissions: ["clipboard-read", "clipboard-write"] });
    await ask(page, "count");
    await idle(page);
    await page.getByRole("button", { name: "Copy" }).last().click();
    await page.waitForFunction(() => document.querySelector("#status").textContent === "Copied.");
    assert.equal(await page.evaluate(() => navigator.clipboard.readText()), "1 so far");
    const [file] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "Export this conversation" }).click()]);
    assert.equal(file.suggestedFilename(), "count.md");
    const [all] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "Export all" }).click()]);
    const { readFileSync } = await import("node:fs");
    assert.equal(JSON.parse(readFileSync(await all.path(), "utf8"))[0].messages[1].content, "1 so far");
    assert.match(readFileSync(await file.path(), "utf8"), /^# count\n\n\*\*You:\*\*\n\ncount\n\n\*\*fake:\*\*\n\n1 so far\n$/);
  },
  async "dark colours follow the system and the button"() {
    const page = await opened({ colorScheme: "dark" });
    const back = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const dark = await back();
    await ask(page, "markdown please");
    await idle(page);
    await page.screenshot({ path: `${folder}/answer-dark.png` });
    await page.getByRole("button", { name: "Dark colours" }).click();
    assert.notEqual(await back(), dark);
    await page.reload();
    assert.notEqual(await back(), dark);
  },
  async "contrast is enough to read in both colours"() {
    for (const colorScheme of ["light", "dark"]) {
      const page = await opened({ colorScheme });
      await ask(page, "count");
      await idle(page);
      const low = await page.evaluate(() => {
        const parse = (text) => (text.match(/[\d.]+/g) || []).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = (item) => { for (; item; item = item.parentElement) { const found = parse(getComputedStyle(item).backgroundColor); if (found.length === 3 || found[3] > 0) return found; } return [255, 255, 255]; };
        return [...document.querySelectorAll("button, p, .who, .body, .figures, label, h1, select")].filter((item) => item.offsetWidth && item.textContent.trim()).filter((item) => {
          const [a, b] = [light(parse(getComputedStyle(item).color)), light(behind(item))];
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
        }).map((item) => item.outerHTML.slice(0, 80));
      });
      assert.deepEqual(low, [], colorScheme);
    }
  },
  async "a phone has room for all of it"() {
    const page = await opened({ viewport: { width: 360, height: 640 }, isMobile: true, hasTouch: true, deviceScaleFactor: 2 });
    await ask(page, "markdown please");
    await idle(page);
    await page.screenshot({ path: `${folder}/phone.png` });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    assert.ok(wide <= 0, `the page is ${wide} pixels too wide`);
    await page.getByRole("button", { name: "Conversations" }).click();
    await page.waitForTimeout(300);
    await page.screenshot({ path: `${folder}/phone-list.png` });
    await page.locator("#side").getByRole("button", { name: "New conversation" }).first().click();
    await page.waitForTimeout(300);
    assert.equal(await page.locator("#talk .message").count(), 0);
    assert.equal(await page.evaluate(() => getComputedStyle(document.querySelector("#side")).visibility), "hidden");
  },
  async "a model without a chat template continues a text"() {
    const page = await opened();
    await page.locator("#model").selectOption("base");
    assert.equal(await page.locator("#text").getAttribute("placeholder"), "Write the beginning of a text");
    await ask(page, "Once upon");
    await idle(page);
    assert.deepEqual(await answers(page), [" a time."]);
    await page.reload();
    assert.equal(await page.locator("#model").inputValue(), "base", "the chosen model is kept");
  },
  async "errors are shown and do not end the conversation"() {
    const page = await opened();
    await ask(page, "x".repeat(5000));
    await idle(page);
    assert.match((await answers(page))[0], /No answer: This model's maximum context length is 2,000 tokens/);
    await page.screenshot({ path: `${folder}/error.png` });
  },
  async "a server with a key asks for it"() {
    const page = await opened();
    await page.evaluate(() => localStorage.clear());
    await page.reload();
    await page.waitForFunction(() => document.querySelector("#about").textContent.includes("key"));
    await page.getByRole("button", { name: "Settings" }).click();
    await page.getByLabel("API key").fill(key);
    await page.getByRole("button", { name: "Save", exact: true }).click();
    await page.waitForFunction(() => document.querySelector("#model").options.length > 0);
    await ask(page, "count");
    await idle(page);
    assert.deepEqual(await answers(page), ["1 so far"]);
  },
};

let failed = 0;
const withKey = "a server with a key asks for it";
for (const [name, check] of Object.entries(checks)) {
  if ((name === withKey) !== Boolean(key)) continue;
  try {
    await check();
    assert.deepEqual(problems.splice(0).filter((line) => !key || !line.includes("401")), []);
    console.log(`ok: ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED: ${name}\n${error.stack}`);
  }
  for (const context of browser.contexts()) await context.close();
}
await browser.close();
process.exit(failed ? 1 : 0);
