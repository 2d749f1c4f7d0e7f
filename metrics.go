package main

import (
	"bytes"
	"crypto/subtle"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// metrics counts what happens, for Prometheus (text format 0.0.4).
type metrics struct {
	mu     sync.Mutex     // guards counts
	counts map[string]int // by series
}

// count adds one to a series, such as wxscan_tickets_total{flow="scan"}.
func (m *metrics) count(format string, args ...any) {
	series := fmt.Sprintf(format, args...)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counts[series]++
}

// logEvent logs and counts that a ticket has come to a status, by a short id of
// its digest that ties the lines of one login together.
func (s *server) logEvent(k key, r record) {
	if s.talk.pass(one(string(r.Status))) == 0 {
		s.log.Info("login "+string(r.Status), "login", k.String()[:8], "flow", r.Flow)
	}
	switch r.Status {
	case statusPending:
		s.metrics.count("wxscan_tickets_total{flow=%q}", r.Flow)
	case statusDone, statusDeclined, statusExpired:
		s.metrics.count("wxscan_logins_total{flow=%q,outcome=%q}", r.Flow, r.Status)
	}
}

// showMetrics answers with all metrics, to who has METRICS_TOKEN. That the peer
// is loopback says nothing: a proxy's is too, whoever asks it.
func (s *server) showMetrics(w http.ResponseWriter, r *http.Request) error {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if has := s.config.metricsToken; has == "" || subtle.ConstantTimeCompare([]byte(token), []byte(has)) != 1 {
		return errNothingHere
	}
	var page bytes.Buffer
	about := func(name, kind, help string) {
		fmt.Fprintf(&page, "# HELP %[1]s %[3]s\n# TYPE %[1]s %[2]s\n", name, kind, help)
	}
	m := &s.metrics
	m.mu.Lock()
	counts := maps.Clone(m.counts)
	m.mu.Unlock()
	for _, counter := range [][2]string{
		{"wxscan_tickets_total", "QR codes made, by flow."},
		{"wxscan_logins_total", "Ends of logins, by flow and outcome."},
		{"wxscan_wechat_calls_total", "Calls of WeChat's API, by path and result."},
	} {
		about(counter[0], "counter", counter[1])
		for _, series := range slices.Sorted(maps.Keys(counts)) {
			if strings.HasPrefix(series, counter[0]+"{") {
				fmt.Fprintln(&page, series, counts[series])
			}
		}
	}
	about("wxscan_waiting_browsers", "gauge", "Polls that wait for a scan.")
	fmt.Fprintln(&page, "wxscan_waiting_browsers", s.parked.count())
	if s.redis == nil {
		about("wxscan_live_tickets", "gauge", "Tickets that wait, or whose result can be read.")
		fmt.Fprintln(&page, "wxscan_live_tickets", s.local.count.Load())
	}
	up := 1
	if errors.Is(s.tickets.records.ready(), errStoreUnavailable) {
		up = 0
	}
	about("wxscan_store_up", "gauge", "1 while logins can be kept, 0 while Redis is away.")
	fmt.Fprintln(&page, "wxscan_store_up", up)
	about("wxscan_access_token_age_seconds", "gauge", "Age of the access token; 0 without one.")
	fmt.Fprintln(&page, "wxscan_access_token_age_seconds", s.wechat.tokenAge().Seconds())
	return write(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", page.Bytes())
}
