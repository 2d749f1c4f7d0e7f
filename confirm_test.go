package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const firefox = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:140.0) Gecko/20100101 Firefox/140.0"

// Where the phone ends.
const confirmed, notConfirmed = "/static/html/loginsucceed.html", "/static/html/loginfailed.html?reason="

// asked begins a login as a browser does, and lets alice scan. It returns the
// ticket, and the secret of the link that her phone gets.
func (w *world) asked(t *testing.T, begin string) (ticket, secret string) {
	t.Helper()
	ticket = w.begin(t, begin, "User-Agent", firefox, "peer", "203.0.113.7:1").Ticket
	return ticket, w.claim(ticket, "alice")
}

// claim lets somebody scan, and returns the secret of the link that they get, if any.
func (w *world) claim(ticket, openID string) (secret string) {
	_, shown := w.scan(ticket, openID, "")
	if link := regexp.MustCompile(`/wechat/confirm\?s=(\w+)`).FindStringSubmatch(shown); link != nil {
		return link[1]
	}
	return ""
}

// answerPhone answers a page that was shown long ago: with "yes", which is the right
// number, with "other", which is one of the wrong ones, or as it is said.
func (w *world) answerPhone(secret, answer string) (location string) {
	k := parseKey(secret[:min(len(secret), 2*len(key{}))])
	switch numbers := choices(k, secret); {
	case answer == "yes":
		answer = number(k)
	case answer == "other":
		answer = numbers[(slices.Index(numbers, number(k))+1)%len(numbers)]
	}
	return w.submit("/wechat/confirm", "s", secret, "shown", "0", "answer", answer).Header().Get("Location")
}

func TestNobodyIsLoggedInBeforeThePhoneConfirms(t *testing.T) {
	for _, begin := range []string{"getloginqr", "getauthqr"} {
		for _, test := range []struct {
			answer, leads string
			want          pollAnswer
		}{
			{"yes", confirmed, pollAnswer{Login: true, Status: statusDone, login: login{OpenID: "alice"}}},
			{"no", notConfirmed + "declined", pollAnswer{Status: statusDeclined}},
			{"other", notConfirmed + "number", pollAnswer{Status: statusDeclined}},
		} {
			w := newWorld(t, "CONFIRM=true", "SITE_NAME=Shop")
			ticket, secret := w.asked(t, begin)
			got := w.check(t, ticket, "")
			if got != (pollAnswer{Status: statusScanned, Number: got.Number, ExpiresIn: 300}) || len(got.Number) != 2 {
				t.Errorf("%s: after the scan: %+v", begin, got)
			}
			page := w.do("GET", "/wechat/confirm?s="+secret, "").Body.String() // which decides nothing
			for _, told := range []string{"Shop", "127.0.0.1:80", "Firefox, Windows", "203.0.113.7", got.Number} {
				equal(t, "the phone is told "+told, strings.Contains(page, told), true)
			}
			equal(t, fmt.Sprintf("%s, %q leads", begin, test.answer), w.answerPhone(secret, test.answer), test.leads)
			equal(t, "another answer leads", w.answerPhone(secret, "yes"), notConfirmed+"expired")
			equal(t, "the page, once decided", w.do("GET", "/wechat/confirm?s="+secret, "").Code, http.StatusSeeOther)
			got = w.check(t, ticket, "")
			equal(t, "a token", got.Token != "", got.Login)
			got.Token = ""
			equal(t, fmt.Sprintf("%s, after %q", begin, test.answer), got, test.want)
			if strings.Contains(w.logged.String(), secret) {
				t.Error("the secret is in the log")
			}
		}
	}
}

// askedPhone opens the phone's page, and returns its form: the hidden fields, and
// the answers that can be pressed, from left to right and downwards.
func (w *world) askedPhone(secret string) (hidden, answers []string) {
	page := w.do("GET", "/wechat/confirm?s="+secret, "").Body.String()
	for _, field := range regexp.MustCompile(`name="(\w+)" value="(\w+)"`).FindAllStringSubmatch(page, -1) {
		if field[1] == "answer" {
			answers = append(answers, field[2])
		} else {
			hidden = append(hidden, field[1], field[2])
		}
	}
	return hidden, answers
}

func TestThePhoneIsNotToldWhichNumberIsRight(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	ticket, secret := w.asked(t, "getauthqr")
	_, answers := w.askedPhone(secret)
	if _, again := w.askedPhone(secret); len(answers) != 4 || answers[3] != "no" || !slices.Equal(again, answers) ||
		!slices.Contains(answers, w.check(t, ticket, "").Number) {
		t.Errorf("answers %q, and at another look %q", answers, again)
	}
	const times = 1000
	var places [3]int // of the right one, for many secrets of one ticket
	for i := range times {
		k, sent := digest("ticket"), strconv.Itoa(i)
		numbers := choices(k, sent)
		places[slices.Index(numbers, number(k))]++
		slices.Sort(numbers)
		if len(slices.Compact(numbers)) != 3 || numbers[0] < "10" || len(strings.Join(numbers, "")) != 6 {
			t.Errorf("numbers %q", numbers)
		}
	}
	if slices.Min(places[:]) < times/4 {
		t.Errorf("the right number stands at the places %v times", places)
	}
}

func TestAnswersWithinASecondDecideNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "CONFIRM=true")
		ticket, secret := w.asked(t, "getauthqr")
		right, begun := number(digest(ticket)), time.Now()
		answer := func(want string, fields ...string) {
			t.Helper()
			got := w.submit("/wechat/confirm", fields...).Header().Get("Location")
			equal(t, fmt.Sprintf("after %v, %q leads", time.Since(begun), fields[2:]), got, want)
		}
		again := "/wechat/confirm?s=" + secret
		hidden, answers := w.askedPhone(secret)
		for _, pause := range []time.Duration{0, 999 * time.Millisecond} {
			time.Sleep(pause)
			for _, pressed := range answers {
				answer(again, append(hidden, "answer", pressed)...)
			}
		}
		time.Sleep(time.Millisecond)
		shownAgain, _ := w.askedPhone(secret)
		answer(again, append(shownAgain, "answer", right)...)
		toCome := strconv.FormatInt(time.Now().Add(time.Hour).UnixMilli(), 10)
		for _, shown := range []string{"", "x", toCome, "9223372036854775807"} {
			answer(again, "s", secret, "shown", shown, "answer", right)
		}
		answer(confirmed, append(hidden, "answer", right)...)
		equal(t, "login", w.check(t, ticket, "").Login, true)
	})
}

func TestWhatThePageDoesNotAskForIsNoAnswer(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	another, _ := w.asked(t, "getauthqr")
	ticket, secret := w.asked(t, "getauthqr")
	id, right, other := digest(another).String(), number(digest(ticket)), 10
	for _, sent := range []string{"", "x", id, id + secret[len(id):], digest("unknown").String() + secret, another,
		secret[:len(secret)-1] + "!"} {
		equal(t, fmt.Sprintf("the secret %q leads", sent), w.answerPhone(sent, "yes"), notConfirmed+"expired")
		shown := w.do("GET", "/wechat/confirm?s="+sent, "").Header().Get("Location")
		equal(t, fmt.Sprintf("the page of the secret %q", sent), shown, notConfirmed+"expired")
	}
	numbers := choices(digest(ticket), secret)
	for slices.Contains(numbers, strconv.Itoa(other)) {
		other++
	}
	all := strings.Join(numbers, ",")
	for _, answer := range []string{"", "No", " " + right, "0" + right, strconv.Itoa(other), all} {
		equal(t, fmt.Sprintf("%q leads", answer), w.answerPhone(secret, answer), "/wechat/confirm?s="+secret)
	}
	tooMuch := strings.Repeat("&", maxBody)
	w.submit("/wechat/confirm", "s", secret, "shown", "0", "answer", right, "x", tooMuch)
	for _, ticket := range []string{ticket, another} {
		equal(t, "status", w.check(t, ticket, "").Status, statusScanned)
	}
	w.config.sessionSecrets = []string{secretB, w.config.sessionSecrets[0]} // as after a restart, to change the secret
	w.answerPhone(secret, "yes")
	equal(t, "the right number counts", w.check(t, ticket, "").Login, true)
}

func TestASecondScanChangesNoClaim(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	ticket, secret := w.asked(t, "getloginqr")
	equal(t, "bob is asked to confirm alice's login by", w.claim(ticket, "bob"), "")
	equal(t, "alice has lost the link, scans again and gets", w.claim(ticket, "alice"), secret)
	w.answerPhone(secret, "yes")
	equal(t, "logged in", w.check(t, ticket, "").OpenID, "alice")
	equal(t, "the link after the login", w.claim(ticket, "alice"), "")
}

func TestACallbackOpenedAgainTellsWhatWasDecided(t *testing.T) {
	for answer, want := range map[string]string{"yes": confirmed, "no": notConfirmed + "declined"} {
		w := newWorld(t, "CONFIRM=true")
		callback := w.press(w.begin(t, "getauthqr").URL, "alice", "allow").Header().Get("Location")
		_, secret, _ := strings.Cut(w.do("GET", callback, "").Header().Get("Location"), "s=")
		w.answerPhone(secret, answer)
		equal(t, fmt.Sprintf("after %q", answer), w.do("GET", callback, "").Header().Get("Location"), want)
	}
}

func TestPollHearsOfEachStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "CONFIRM=true")
		qr := w.begin(t, "getauthqr")
		time.AfterFunc(3*time.Second, func() {
			secret := w.claim(qr.Ticket, "alice")
			time.Sleep(7 * time.Second)
			w.answerPhone(secret, "yes")
		})
		start := time.Now()
		for _, test := range []struct {
			wait string // and the status that the browser has seen
			want status
			at   time.Duration
		}{
			{"25", statusScanned, 3 * time.Second},
			{"25&status=pending", statusScanned, 3 * time.Second}, // it missed the step
			{"5&status=scanned", statusScanned, 8 * time.Second},
			{"1", statusScanned, 9 * time.Second}, // an old client is not answered in a hurry
			{"25&status=scanned", statusDone, 10 * time.Second},
			{"25&status=done", statusDone, 10 * time.Second},
		} {
			equal(t, "wait="+test.wait, w.check(t, qr.Ticket, test.wait).Status, test.want)
			equal(t, "wait="+test.wait+" ends at", time.Since(start), test.at)
		}
	})
}

func TestThePhoneIsToldTheBrowserAndTheSystem(t *testing.T) {
	for agent, want := range map[string]string{
		firefox: "Firefox, Windows",
		"(Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 Chrome/140.0 Safari/537.36 Edg/140.0": "Edge, macOS",
		"(iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 Version/18.0 Safari/604.1":   "Safari, iPhone",
		// The common browsers of China, which call themselves Chrome or Safari too.
		"(Linux; Android 15) Chrome/140.0 Mobile Safari/537.36 MicroMessenger/8.0.50": "WeChat, Android",
		"(Linux; Android 15) Chrome/120.0 MQQBrowser/15.5 Mobile Safari/537.36":       "QQ, Android",
		"(Windows NT 10.0; Win64; x64) Chrome/86.0 Safari/537.36 360SE":               "360, Windows",
		"(Phone; OpenHarmony 5.0) Chrome/114.0.0.0 Safari/537.36 ArkWeb/4":            "Chrome, HarmonyOS",
		"curl/8.5.0": "curl", "<script>": "Other", "Something (X11; Linux)": "Other, Linux",
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("User-Agent", agent)
		equal(t, agent, (&server{config: config{confirm: true}}).asker(r).Browser, want)
		equal(t, "without CONFIRM, who asked", (&server{}).asker(r), asker{})
	}
}
