package main

import (
	"bytes"
	"crypto/subtle"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts what happens, for Prometheus (text format 0.0.4).
type metrics struct {
	waiting atomic.Int64 // parked polls

	mu     sync.Mutex           // guards the fields below
	counts map[string]int       // by series
	toTell [len(toldWithin)]int // scans by the time to the browser's answer
	told   time.Duration        // the sum of these times
}

// toldWithin are the upper bounds of the histogram's buckets, in seconds.
var toldWithin = [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, math.Inf(1)}

// count adds one to a series, such as wxscan_tickets_total{flow="scan"}.
func (m *metrics) count(format string, args ...any) {
	series := fmt.Sprintf(format, args...)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counts[series]++
}

// tell counts a browser that has learned of a login that long after the scan.
func (m *metrics) tell(after time.Duration) {
	bucket, _ := slices.BinarySearch(toldWithin[:], after.Seconds())
	m.mu.Lock()
	defer m.mu.Unlock()
	m.toTell[bucket]++
	m.told += after
}

// step logs and counts a step of a login, by a short id of its ticket's digest
// that ties the steps of one login together.
func (s *server) step(t *ticket, step string) {
	if s.talk.pass(step) == 0 {
		s.log.Info("login "+step, "login", t.key.String()[:8], "flow", t.flow())
	}
	switch step {
	case "begun":
		s.metrics.count("wxscan_tickets_total{flow=%q}", t.flow())
	case "done", "declined", "expired":
		s.metrics.count("wxscan_logins_total{flow=%q,outcome=%q}", t.flow(), step)
	}
}

// show answers with all metrics: to loopback, or to who has METRICS_TOKEN.
func (s *server) showMetrics(w http.ResponseWriter, r *http.Request) error {
	_, foreign := client(r, s.config.trusted)
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if has := s.config.metricsToken; foreign && (has == "" || subtle.ConstantTimeCompare([]byte(token), []byte(has)) != 1) {
		return errNothingHere
	}
	var page bytes.Buffer
	about := func(name, kind, help string) {
		fmt.Fprintf(&page, "# HELP %[1]s %[3]s\n# TYPE %[1]s %[2]s\n", name, kind, help)
	}
	m := &s.metrics
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, counter := range [][2]string{
		{"wxscan_tickets_total", "QR codes made, by flow."},
		{"wxscan_logins_total", "Ends of logins, by flow and outcome."},
		{"wxscan_wechat_calls_total", "Calls of WeChat's API, by path and result."},
	} {
		about(counter[0], "counter", counter[1])
		for _, series := range slices.Sorted(maps.Keys(m.counts)) {
			if strings.HasPrefix(series, counter[0]+"{") {
				fmt.Fprintln(&page, series, m.counts[series])
			}
		}
	}
	about("wxscan_waiting_browsers", "gauge", "Polls that wait for a scan.")
	fmt.Fprintln(&page, "wxscan_waiting_browsers", m.waiting.Load())
	about("wxscan_live_tickets", "gauge", "Tickets that wait, or whose result can be read.")
	fmt.Fprintln(&page, "wxscan_live_tickets", s.tickets.count())
	about("wxscan_access_token_age_seconds", "gauge", "Age of the access token; 0 without one.")
	fmt.Fprintln(&page, "wxscan_access_token_age_seconds", s.wechat.tokenAge().Seconds())
	about("wxscan_scan_to_answer_seconds", "histogram", "Time from a scan to the browser's answer.")
	sum := 0
	for i, within := range toldWithin {
		sum += m.toTell[i]
		fmt.Fprintf(&page, "wxscan_scan_to_answer_seconds_bucket{le=\"%g\"} %d\n", within, sum)
	}
	fmt.Fprintf(&page, "wxscan_scan_to_answer_seconds_sum %g\nwxscan_scan_to_answer_seconds_count %d\n", m.told.Seconds(), sum)
	return write(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", page.Bytes())
}
